"""Chat templates, rendered in transformers' sandbox and within bounds of time and memory.

A template is a program from a model's directory, and transformers' sandbox keeps it from files and the interpreter, but
not from running or growing for ever. Here every step it takes and everything it makes is counted. What templates mean
(filters, globals, extensions) is taken from transformers as it is; ``prompts.py`` says what they are given.
"""

import time
from collections.abc import Callable, Iterable
from functools import wraps
from itertools import chain
from typing import Any

from jinja2 import TemplateRuntimeError, nodes
from jinja2.compiler import CodeGenerator
from jinja2.environment import Template
from jinja2.runtime import Context, Macro, markup_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils.chat_template_utils import _compile_jinja_template

from opta_lmx.inference.worker.template_checks import FILTER_CHECKS, check_method, check_operation

# For one rendering. The slowest of 121 templates of known models takes 0.08 s for a history of 100
# messages, all of them 4 ms on average, on one core of a shared x86 server.
MOST_SECONDS = 2.0

# Characters of everything one rendering makes, intermediate results included: ten times what the longest contexts
# there are (a million tokens) come to, and at most some hundred megabytes.
_MOST_MADE = 50_000_000

# What an item of a new list counts for, as it takes more time and memory than a character.
_ITEM = 16

# Of a template itself; the longest known have under 100,000.
_LONGEST_TEMPLATE = 1_000_000

# The clock is read once in so many steps.
_STEPS_A_LOOK = 64


class TemplateTooCostly(TemplateRuntimeError):
    """The template passed a bound; it would pass it again over other messages, too."""


class Budget:
    """What one rendering may still do."""

    def __init__(self, most_seconds: float) -> None:
        self._most_seconds = most_seconds
        self.start()

    def start(self) -> None:
        """Begin anew."""
        self._steps = 0
        self._ends_at = time.thread_time() + self._most_seconds
        self.left = _MOST_MADE
        self._weights: dict[int, tuple[object, int]] = {}

    def tick(self) -> None:
        """One step was taken; raises TemplateTooCostly once the time is over."""
        self._steps += 1
        if self._steps % _STEPS_A_LOOK == 0 and time.thread_time() > self._ends_at:
            raise TemplateTooCostly(f"it ran for more than {self._most_seconds:g} s")

    def spend(self, size: int) -> None:
        """So many characters or items were made, or are about to be."""
        self.left -= size
        if self.left < 0:
            raise TemplateTooCostly(f"it made more than {_MOST_MADE:,} characters")

    def made(self, value: Any) -> Any:
        """``value``, counted by its size; a list that holds one thing many times weighs it many times."""
        if isinstance(value, str):
            self.spend(len(value))
        elif isinstance(value, list | tuple | dict):
            self.spend(len(value) * _ITEM)
            self.weigh(value)
        return value

    def cut(self, value: Any) -> Any:
        """``value``, a part of another text or list, counted."""
        if isinstance(value, str | list | tuple):
            self.spend(len(value))
        return value

    def weigh(self, value: object) -> int:
        """The size of ``value`` written out; raises TemplateTooCostly where that passes the bound."""
        if not isinstance(value, list | tuple | dict):
            return len(value) + 1 if isinstance(value, str) else 1
        known = self._weights.get(id(value))
        if known is not None:
            return known[1]
        weight = 1
        for item in chain(value.keys(), value.values()) if isinstance(value, dict) else value:
            weight += self.weigh(item) if isinstance(item, list | tuple | dict | str) else 1
        return self.note(value, weight)

    def note(self, value: object, weight: int) -> int:
        """Remember the weight of a list or dict; raises TemplateTooCostly where it passes the bound."""
        if weight > _MOST_MADE:
            raise TemplateTooCostly(f"it made more than {_MOST_MADE:,} characters")
        # The value is kept with its weight, so that no other can take its id.
        self._weights[id(value)] = (value, weight)
        return weight


class BoundedCode(CodeGenerator):
    """jinja2's compiler, which also counts: every block that is entered, every list, dict and slice that is made."""

    def blockvisit(self, nodes: Iterable[nodes.Node], frame: Any) -> None:
        """The body of a loop, a branch, a macro."""
        self.writeline("environment.tick()")
        super().blockvisit(nodes, frame)

    def visit_For(self, node: nodes.For, frame: Any) -> None:  # noqa: N802 - jinja2's name
        """A loop whose condition never holds has no body to count in."""
        if node.test is not None:
            step = nodes.Call(nodes.EnvironmentAttribute("goes_on"), [], [], None, None)
            node.test = nodes.And(step, node.test, lineno=node.lineno)
        super().visit_For(node, frame)

    def visit_List(self, node: nodes.List, frame: Any) -> None:  # noqa: N802 - jinja2's name
        """Lists of constants, which many comparisons hold, are no work."""
        self._counted(all(isinstance(item, nodes.Const) for item in node.items), super().visit_List, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Any) -> None:  # noqa: N802 - jinja2's name
        """As lists, unless it is the target of an assignment."""
        plain = node.ctx != "load" or all(isinstance(item, nodes.Const) for item in node.items)
        self._counted(plain, super().visit_Tuple, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Any) -> None:  # noqa: N802 - jinja2's name
        """As lists."""
        self._counted(not node.items, super().visit_Dict, node, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Any) -> None:  # noqa: N802 - jinja2's name
        """A slice is a copy."""
        self._counted(not isinstance(node.arg, nodes.Slice), super().visit_Getitem, node, frame, by="cut")

    def _counted(
        self, plain: bool, visit: Callable[[Any, Any], None], node: nodes.Node, frame: Any, by: str = "made"
    ) -> None:
        if plain:
            visit(node, frame)
        else:
            self.write(f"environment.{by}(")
            visit(node, frame)
            self.write(")")


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """transformers' environment for chat templates with a Budget. Used by one thread at a time."""

    code_generator_class = BoundedCode
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, most_seconds: float) -> None:
        theirs = _compile_jinja_template("").environment
        super().__init__(trim_blocks=theirs.trim_blocks, lstrip_blocks=theirs.lstrip_blocks)
        self.budget = Budget(most_seconds)
        self.tick, self.made, self.cut = self.budget.tick, self.budget.made, self.budget.cut
        self.concat = self.joined  # type: ignore[method-assign]  # jinja2's own name for it
        self.extensions = {name: extension.bind(self) for name, extension in theirs.extensions.items()}
        self.tests.update(theirs.tests)
        self.globals.update({name: value for name, value in theirs.globals.items() if name != "lipsum"})
        self.globals.pop("lipsum")
        self.filters = {name: self._counting(name, function) for name, function in theirs.filters.items()}

    def goes_on(self) -> bool:
        """True; that it was called has been counted."""
        return True

    def joined(self, pieces: Iterable[object]) -> str:
        """The pieces as one text, which is given up as soon as it is too long."""
        texts, left = [], self.budget.left
        for piece in pieces:
            text = piece if type(piece) is str else str(piece)
            texts.append(text)
            left -= len(text)
            if left < 0:
                break
        self.budget.spend(self.budget.left - left)
        return "".join(texts)

    def joined_markup(self, pieces: Iterable[object]) -> str:
        """The same within ``{% autoescape %}``."""
        held = list(pieces)
        self.joined(held)
        return markup_join(held)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An operation whose result may be larger than both its sides."""
        if operator == "+":
            total = left + right
            if isinstance(total, list | tuple):  # built up one by one, each would be weighed again and again
                self.budget.note(total, self.budget.weigh(left) + self.budget.weigh(right))
            return self.made(total)
        self.budget.spend(check_operation(operator, left, right))
        return self.made(self.binop_table[operator](left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - as jinja2's
        """A call of anything, by a template."""
        self = __self
        self.tick()
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        if isinstance(owner, str | bytes | int):
            self.budget.spend(check_method(__obj.__name__, owner, args, kwargs))
        elif isinstance(__obj, Macro):
            for value in (*args, *kwargs.values()):
                self.budget.weigh(value)
        return self.made(super().call(__context, __obj, *args, **kwargs))

    def _counting(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that takes a step, and is checked first if it can make much of little."""
        check = FILTER_CHECKS.get(name)
        first = 1 if hasattr(function, "jinja_pass_arg") else 0

        @wraps(function)
        def counting(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            if check is not None:
                self.budget.spend(check(*args[first:], **kwargs))
            return self.made(function(*args, **kwargs))

        return counting

    def _generate(self, *args: Any, **kwargs: Any) -> str:
        # The first line imports jinja2's own names for what puts texts together.
        imports, rest = super()._generate(*args, **kwargs).split("\n", 1)
        names = "concat = str_join = environment.joined; markup_join = environment.joined_markup"
        return f"{imports}; {names}\n{rest}"


class Templates:
    """Compiles each template once and renders it. Used by one thread at a time."""

    def __init__(self, most_seconds: float = MOST_SECONDS) -> None:
        """``most_seconds`` of this thread's processor time for one rendering."""
        self._environment = BoundedEnvironment(most_seconds)
        self._compiled: dict[str, Template] = {}

    def render(self, template: str, variables: dict[str, Any]) -> str:
        """The text a template makes; raises TemplateTooCostly past a bound, and whatever else a template can raise."""
        budget = self._environment.budget
        compiled = self._compiled.get(template)
        if compiled is None:
            if len(template) > _LONGEST_TEMPLATE:
                raise TemplateTooCostly(f"it is longer than {_LONGEST_TEMPLATE:,} characters")
            budget.start()
            compiled = self._compiled[template] = self._environment.from_string(template)
        budget.start()
        try:
            return compiled.render(variables)
        finally:
            budget.start()  # lets go of what was weighed
