"""The registry written down: as the torch-free table behind ``--help``, and as Markdown for readers.

``python -m texforce_hub.merge.methods.listing > texforce_hub/cli/merge_methods.py`` writes the table anew; a test
compares it with the registry.
"""

import json
import sys
from typing import get_args

from texforce_hub.merge.methods.registry import METHODS, Law, Method, Option

LAWS: tuple[Law, ...] = get_args(Law)


def render_markdown() -> str:
    """The methods as a Markdown table: what each does, the laws it keeps, its options."""
    head = f"| method | what it does | {' | '.join(LAWS)} | options |"
    rule = f"|---|---|{':-:|' * len(LAWS)}---|"
    return "\n".join([head, rule, *(_markdown_row(method) for method in METHODS.values())]) + "\n"


def _markdown_row(method: Method) -> str:
    laws = " | ".join("✓" if law in method.laws else "" for law in LAWS)
    options = ", ".join(f"`{name}={option.default}`" for name, option in method.options.items())
    return f"| `{method.name}` | {method.summary} | {laws} | {options} |"


def render_module() -> str:
    """The source of ``texforce_hub/cli/merge_methods.py``."""
    lines = [
        '"""Merge methods, for ``--help`` without torch: by ``python -m texforce_hub.merge.methods.listing``."""',
        "",
        "# fmt: off",
        "METHODS: dict[str, tuple[str, dict[str, str]]] = {",
    ]
    for method in METHODS.values():
        lines.append(f"    {json.dumps(method.name)}: (")
        lines.append(f"        {json.dumps(method.summary, ensure_ascii=False)},")
        lines.append("        {")
        for name, option in method.options.items():
            lines.append(f"            {json.dumps(name)}: {json.dumps(_described(option), ensure_ascii=False)},")
        lines += ["        },", "    ),"]
    return "\n".join([*lines, "}", ""])


def _described(option: Option) -> str:
    values = "|".join(option.choices) or "a share in (0, 1]"
    default = "" if option.default is None else f", default {option.default}"
    return f"{values}{default}"


if __name__ == "__main__":
    sys.stdout.write(render_module())
