"""As short as a drafter can be: one option, and a row that remembers how often it was right."""

from dataclasses import dataclass
from typing import Annotated

from specdec import RowDrafter, TokenTree
from specdec.drafters.row import DraftRow, RowRound
from specdec.method_options import MethodOptions, Range


@dataclass(frozen=True)
class ParrotConfig(MethodOptions):
    length: Annotated[int, Range(1, 8)] = 4


class Parrot(RowDrafter):
    Config = ParrotConfig

    class Row(DraftRow):
        right = 0

        def propose(self, budget: int) -> TokenTree:
            again = self.text[-self.config.length - self.right :]
            return TokenTree.chain(self.text[-1], again[:budget])

        def observe(self, outcome: RowRound) -> None:
            self.right = len(outcome.path)
