"""Say why a model decides so.

    python launch/explain.py runs/x photo.jpg
    python launch/explain.py runs/x photo.jpg --against dog --methods located,frozen,occlusion
    python launch/explain.py runs/x --data data/digits --num 8 --train data/digits --out report
    deepspeed launch/explain.py runs/22b --tensor_parallel_size 8 photos/
    python launch/explain.py influence runs/x --train data/digits

MODEL is an export, or the folder of a run that has ended. Of each image there are maps over its patches, the
measure of whether they are right, and the way of the decision through the blocks: as one page, index.html,
and as files beside it. `influence` lists the training images whose labels are likely wrong: those that hurt
on validation images most, and those that the classifier explains least.

Exit status: 0 if all images were explained, 1 if some could not be read, 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megavit.cli import Parser, without_local_rank
from megavit.explain.config import ExplainConfig, InfluenceConfig

if TYPE_CHECKING:
    from megavit.explain.explainer import Settings
    from megavit.predictor import Predictor

_INFLUENCE = "influence"


def main(argv: Sequence[str] | None = None) -> int:
    words = without_local_rank(sys.argv[1:] if argv is None else argv)
    is_influence = words[:1] == [_INFLUENCE]
    parser = make_parser(InfluenceConfig if is_influence else ExplainConfig)
    given = vars(parser.parse_args(words[is_influence:]))
    name, photos = given.pop("model"), given.pop("photos", [])
    config: ExplainConfig | InfluenceConfig
    try:
        config = InfluenceConfig(**given) if is_influence else ExplainConfig(**given)
        if isinstance(config, ExplainConfig) and not photos and not config.data:
            raise ValueError("there is nothing to explain: name photos, or a data set with --data DIR")
    except ValueError as error:
        parser.error(str(error))
    from megavit.parallel.rendezvous import wait_asleep

    wait_asleep()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # what is wrong with a photo is said in a line
            return _run(name, photos, config)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        return 130


def make_parser(config: type[ExplainConfig] | type[InfluenceConfig] = ExplainConfig) -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="export, or run folder")
    if config is ExplainConfig:
        parser.add_argument(
            "photos", metavar="PHOTO", nargs="*", type=Path, help="photos, or folders of photos"
        )
    parser.add_fields(config)
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


def _run(name: str, photos: Sequence[Path], config: ExplainConfig | InfluenceConfig) -> int:
    import torch.distributed as dist

    from megavit.explain.run import explain_all, list_label_errors
    from megavit.parallel.mesh import Mesh
    from megavit.predictor import load_classifier

    methods = _methods(config.methods) if isinstance(config, ExplainConfig) else ()
    mesh = Mesh.from_environment(config.tensor_parallel_size)
    predictor = load_classifier(name, dtype=config.dtype, mesh=mesh)
    if isinstance(config, InfluenceConfig):
        code = list_label_errors(name, config, predictor)
    else:
        code = explain_all(name, photos, config, predictor, _settings(config, methods, predictor))
    dist.destroy_process_group()
    return code


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


if __name__ == "__main__":
    sys.exit(main())
