"""What a run writes for people: console, log.jsonl, TensorBoard, environment."""
