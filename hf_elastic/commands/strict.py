"""Commands that take each option once, and whose errors name options as the command line does."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from typer.core import TyperCommand

from hf_elastic.errors import ElasticError, SearchError


class StrictCommand(TyperCommand):
    """A command that refuses a second value where only the last would count."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parses arguments.

        Raises:
            SearchError: an option that takes one value is given twice.
        """
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for parameter, times in Counter(order).items():
            if times > 1 and parameter.param_type_name == "option" and not parameter.multiple:
                raise SearchError(f"{parameter.opts[0]} is given {times} times; it takes one value")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Runs the command; an error says ``--name 3`` where it says ``name=3`` to who calls from Python."""
        try:
            return super().invoke(ctx)
        except ElasticError as error:
            raise type(error)(self._in_words_of_options(str(error))) from error

    def _in_words_of_options(self, text: str) -> str:
        known: dict[str, Any] = {p.name: p for p in self.params if p.param_type_name == "option" and p.name}
        pattern = re.compile(rf"(?<![\w.-])({'|'.join(map(re.escape, known))})=(True\b|False\b)?(?=(\S?))")

        def option(found: re.Match[str]) -> str:
            if _is_in_a_call(text, found.start()):
                return found[0]
            parameter = known[found[1]]
            name = max(parameter.opts, key=len)
            if found[2] == "False":
                return str(parameter.secondary_opts[0]) if parameter.secondary_opts else found[0]
            return name if found[2] or not re.match(r"[\w'\"\[({.-]", found[3]) else f"{name} "

        return pattern.sub(option, text) if known else text


def _is_in_a_call(text: str, place: int) -> bool:
    """Whether a place is within the parentheses of a call, such as ``export(model, merge=True)``."""
    depth = 0
    for at in range(place - 1, 0, -1):
        depth += (text[at] == ")") - (text[at] == "(")
        if depth < 0:
            return text[at - 1].isalnum() or text[at - 1] == "_"
    return False
