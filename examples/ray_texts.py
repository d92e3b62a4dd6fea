"""Texts for a table of requests under Ray Data, which places the workers and starts lost ones again.

    pip install "auxkern[ray]"
    python examples/ray_texts.py requests.jsonl texts --pair out/keyword --workers 2

A row has an id, and the fields of a request: {"id": "r1", "condition": "glacier"}.
"""

from __future__ import annotations

import argparse

import ray

from auxkern.generation import BatchMapper


def main(argv: list[str] | None = None) -> int:
    """How many texts were written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("requests", help="a file of JSON lines")
    parser.add_argument("texts", help="a folder")
    parser.add_argument("--pair", default="out/keyword", help="folder or Hub name of an auxiliary")
    parser.add_argument("--model", help="its base, where that has moved")
    parser.add_argument("--workers", type=int, default=2, help="each holds the models, and a CPU")
    parser.add_argument("--gpus", type=float, default=0, help="of each worker")
    options = parser.parse_args(argv)

    opening = {"base": options.model, "device": "cuda" if options.gpus else "cpu"}
    texts = ray.data.read_json(options.requests).map_batches(
        BatchMapper,
        fn_constructor_kwargs={"pair": options.pair, "defaults": {"max_new_tokens": 64}, **opening},
        batch_size=256,  # several times the engine's slots keep these full
        concurrency=options.workers,
        num_gpus=options.gpus,
    )
    texts = texts.materialize()
    texts.write_json(options.texts)
    print(f"{texts.count()} texts in {options.texts}")
    return texts.count()


if __name__ == "__main__":
    main()
