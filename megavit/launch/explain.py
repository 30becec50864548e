"""Say why a model decides so.

    python launch/explain.py runs/x photo.jpg
    python launch/explain.py runs/x photo.jpg --against dog --methods located,frozen,occlusion
    python launch/explain.py runs/x --data data/digits --num 8 --out report
    deepspeed launch/explain.py runs/22b --tensor_parallel_size 8 photos/

MODEL is an export, or the folder of a run that has ended. Of each image there are maps over its patches, the
measure of whether they are right, and the way of the decision through the blocks: as one page, index.html,
and as files beside it.

Exit status: 0 if all images were explained, 1 if some could not be read, 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from megavit.cli import Parser
from megavit.explain.config import ExplainConfig

if TYPE_CHECKING:
    from megavit.explain.explainer import Settings, Subject
    from megavit.explain.explanation import Explanation
    from megavit.predictor import Predictor


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    words = [word for word in words if not word.startswith(("--local_rank", "--local-rank"))]  # deepspeed's
    parser = make_parser()
    given = vars(parser.parse_args(words))
    name, photos = given.pop("model"), given.pop("photos")
    try:
        config = ExplainConfig(**given)
        if not photos and not config.data:
            raise ValueError("there is nothing to explain: name photos, or a data set with --data DIR")
    except ValueError as error:
        parser.error(str(error))
    from megavit.parallel.mesh import Mesh
    from megavit.parallel.rendezvous import wait_asleep
    from megavit.predictor import load

    wait_asleep()
    try:
        mesh = Mesh.from_environment(config.tensor_parallel_size)
        methods = _methods(config.methods)
        predictor = load(name, dtype=config.dtype, mesh=mesh)
        settings = _settings(config, methods, predictor)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # what is wrong with a photo is said in a line
            return _explain(name, photos, config, predictor, settings)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        return 130


def make_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="export, or run folder")
    parser.add_argument("photos", metavar="PHOTO", nargs="*", type=Path, help="photos, or folders of photos")
    parser.add_fields(ExplainConfig)
    # The deepspeed launcher refuses --num, which might be one of three flags of its own.
    parser.add_argument(
        "--limit",
        dest="num",
        type=int,
        default=argparse.SUPPRESS,
        metavar="N",
        help="another name of --num, for the deepspeed launcher, which takes --num for its own",
    )
    return parser


def _methods(text: str) -> tuple[str, ...]:
    """--methods. ValueError for one that there is not."""
    from megavit.explain.methods import METHODS, check_methods

    named = [word.strip() for word in text.split(",") if word.strip()]
    found = tuple(dict.fromkeys(METHODS if "all" in named else named))
    try:
        check_methods(found)
    except ValueError as error:
        raise ValueError(f"--methods: {error}") from error
    return found


def _settings(config: ExplainConfig, methods: tuple[str, ...], predictor: Predictor) -> Settings:
    from megavit.explain.explainer import Settings, class_number

    def number(flag: str, word: str) -> int | None:
        try:
            return class_number(predictor.names, word) if word else None
        except ValueError as error:
            raise ValueError(f"--{flag}: {error}") from error

    target, against = number("target", config.target), number("against", config.against)
    return Settings(methods, target, against, config.faithfulness, config.seed)


def _explain(
    name: str, photos: Sequence[Path], config: ExplainConfig, predictor: Predictor, settings: Settings
) -> int:
    """Explain batch by batch; the main rank writes. Collective over the world; the exit status."""
    from tqdm import tqdm

    from megavit.explain.explainer import Explainer
    from megavit.explain.inputs import Inputs
    from megavit.explain.report import PAGE, Report

    mesh, missed = predictor.model.mesh, 0
    out = Path(config.out or Path(name) / "explanation")

    def miss(text: str) -> None:
        nonlocal missed
        missed += 1
        _print(" ".join(text.split()), sys.stderr)

    # Only the main rank reads and writes files; what it returns goes to all ranks.
    inputs: Inputs | None = None
    report: Report | None = None

    def begin() -> tuple[int, str | None]:
        nonlocal inputs, report
        inputs = Inputs(predictor, photos, config.data, config.num, miss)
        report = Report(out, f"Why {name} decides so", settings.methods)
        return len(inputs), inputs.data_digest

    def read(start: int, count: int) -> list[Subject]:
        assert inputs is not None
        return inputs.read(start, count)

    def write(of_ranks: Sequence[Sequence[Explanation]]) -> None:
        assert report is not None
        for one in itertools.chain(*of_ranks):
            report.add(one)
            if not config.quiet:
                for line in lines(one):
                    _print(line)

    total, digest = mesh.on_main(begin)
    shows_bars = mesh.is_main and not config.quiet and sys.stderr.isatty()
    with report or nullcontext(), tqdm(total=total, unit=" images", disable=not shows_bars) as bar:
        explainer = Explainer(predictor, settings, facts={"data_digest": digest}, progress=shows_bars)
        count = config.batch_size * mesh.dp_size
        for start in range(0, total, count):
            subjects = mesh.on_main(lambda start=start: read(start, count))  # type: ignore[misc]
            mine = subjects[mesh.dp_rank * config.batch_size :][: config.batch_size]
            found = explainer.explain(mine) if mine else []
            gathered = mesh.gather_for_io(found if mesh.tp_rank == 0 else [])
            mesh.on_main(lambda gathered=gathered: write(gathered))  # type: ignore[misc]
            bar.update(min(count, total - start))
    if mesh.is_main:
        _print(f"{out / PAGE} shows all")
    return 1 if mesh.any(missed > 0) else 0


def lines(found: Explanation) -> list[str]:
    """What the command prints of an image."""
    best = found.top(1)[0]
    says = f"says {best.name} ({best.probability:.3f})" + (f", it is {found.label}" if found.label else "")
    shown = [f"{found.name}: {says}; {found.question} ({found.target.probability:.3f})"]
    for name, judged in found.faithfulness.items():
        numbers = f"insertion {judged.insertion:.3f}  deletion {judged.deletion:.3f}  saco {judged.saco:+.3f}"
        shown.append(f"  {name:<24} {numbers}  {found.verdict(name)}".rstrip())
    for name, sums in found.sums.items():
        rest = f"{sums.residual:.3f} is left over"
        shown.append(f"  {name:<24} sums to {sums.total:.3f} of {sums.difference:.3f}, {rest}")
    return shown + [f"  {warning}" for warning in found.warnings]


def _print(line: str, stream: TextIO | None = None) -> None:
    """Beside a progress bar. Names of files and classes may hold bytes that are no text here."""
    from tqdm import tqdm

    stream = stream or sys.stdout
    encoding = stream.encoding or "utf-8"
    tqdm.write(line.encode(encoding, "backslashreplace").decode(encoding), file=stream)
    stream.flush()


if __name__ == "__main__":
    sys.exit(main())
