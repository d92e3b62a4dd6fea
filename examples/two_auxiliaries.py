"""Two auxiliaries that were trained apart, in one sum: a text with a keyword and a number of words.

python examples/keyword.py --output out/keyword
python examples/keyword.py --output out/length --task length
python examples/two_auxiliaries.py --keyword glacier --length "7 words"
"""

from __future__ import annotations

import argparse

from auxkern.generation import Engine, Member, Request
from auxkern.model import open_pair


def main(argv: list[str] | None = None) -> list[str]:
    """The texts of each auxiliary alone, and of both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="the base, where that has moved")
    parser.add_argument("--keyword-pair", default="out/keyword", help="what examples/keyword.py wrote")
    parser.add_argument("--length-pair", default="out/length")
    parser.add_argument("--keyword", default="glacier")
    parser.add_argument("--length", default="7 words")
    options = parser.parse_args(argv)

    model, text_format = open_pair(options.keyword_pair, base=options.model)
    model.load_auxiliary("length", options.length_pair)  # made for the same base, or refused
    model.use_native_kernels()
    keyword = Member("default", condition=options.keyword)
    length = Member("length", condition=options.length, weight=0.7)
    sums = {"keyword": (Member(), keyword), "length": (Member(), length), "both": (Member(), keyword, length)}
    requests = [Request(name, members=members, max_new_tokens=48) for name, members in sums.items()]
    texts = [one.text for one in Engine(model, text_format).generate(requests)]
    for name, text in zip(sums, texts, strict=True):
        print(f"{name}: {text.strip()}")
    return texts


if __name__ == "__main__":
    main()
