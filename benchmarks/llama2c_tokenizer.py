"""Reader of ``llama2c_tokenizer.json``: BPE pieces with scores, as llama2.c keeps them in ``tokenizer.bin``.

    python benchmarks/llama2c_tokenizer.py [--data DIR]      # checks perplexities against the documented ones
"""

from __future__ import annotations

import argparse
import heapq
import json
from collections.abc import Sequence
from pathlib import Path

_FIRST_BYTE = 3  # <unk>, <s>, </s>, then the 256 bytes where a vocabulary has them


class Llama2cTokenizer:
    """Merges the best-scored neighbouring pair again and again, as ``encode`` of llama2.c's ``run.c`` does.

    Args:
        pieces: text of each token.
        scores: the larger, the earlier a pair that gives this piece is merged.
        bos: token put before every text.
    """

    def __init__(self, pieces: Sequence[str], scores: Sequence[float], *, bos: int = 1) -> None:
        self.pieces, self.scores, self.bos = tuple(pieces), tuple(scores), bos
        self._ids: dict[str, int] = {}
        for number, piece in enumerate(self.pieces):
            self._ids.setdefault(piece, number)
        self._has_bytes = "<0x0A>" in self._ids

    @classmethod
    def load(cls, folder: Path) -> Llama2cTokenizer:
        """Reads the file beside a checkpoint's ``config.json``."""
        stored = json.loads((folder / "llama2c_tokenizer.json").read_text(encoding="utf-8"))
        return cls(stored["pieces"], stored["scores"], bos=stored["bos"])

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, the beginning-of-sequence token first."""
        if not text:
            return [self.bos]
        # SentencePiece puts a space before every text.
        return [self.bos, *self._merged([token for character in " " + text for token in self._characters(character)])]

    def _characters(self, character: str) -> list[int]:
        if character in self._ids:
            return [self._ids[character]]
        return [byte + _FIRST_BYTE for byte in character.encode()] if self._has_bytes else [0]

    def _merged(self, tokens: list[int]) -> list[int]:
        """run.c scans all pairs for the best score, the first of equals; a heap gives the same order in n log n."""
        following = [*range(1, len(tokens)), -1]
        preceding = [-1, *range(len(tokens) - 1)]
        heap: list[tuple[float, int, int, int, int]] = []

        def offer(left: int) -> None:
            right = following[left] if left >= 0 else -1
            if right >= 0:
                joined = self._ids.get(self.pieces[tokens[left]] + self.pieces[tokens[right]])
                if joined is not None:
                    heapq.heappush(heap, (-self.scores[joined], left, tokens[left], tokens[right], joined))

        for position in range(len(tokens)):
            offer(position)
        while heap:
            _, left, first, second, joined = heapq.heappop(heap)
            right = following[left]
            if tokens[left] != first or right < 0 or tokens[right] != second:
                continue  # one of the two was merged with another neighbour since
            tokens[left], tokens[right] = joined, -1
            following[left] = following[right]
            if following[left] >= 0:
                preceding[following[left]] = left
            offer(left)
            offer(preceding[left])
        return [token for token in tokens if token >= 0]


def main() -> None:
    from stories import MODELS, add_data_argument, checked_data, load_parent, measured_perplexity

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_argument(parser)
    folder = checked_data(parser.parse_args().data)
    for name, model in MODELS.items():
        parent, tokenizer = load_parent(folder, name)
        found = measured_perplexity(parent, tokenizer, model.validation(folder))
        verdict = "as documented" if abs(found - model.documented) < 0.01 else "NOT AS DOCUMENTED"
        print(f"{name}: perplexity {found:.3f}, documented {model.documented}: {verdict}")


if __name__ == "__main__":
    main()
