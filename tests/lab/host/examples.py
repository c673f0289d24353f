# SPDX-License-Identifier: GPL-2.0-or-later
"""The examples of the user page, which a scenario runs as they stand there.

A comment `.. lab-example: NAME` marks the code block that follows it.
"""
import re
import textwrap

EXAMPLE = re.compile(r"^\.\. lab-example: (\S+)\n\n"
                     r"\.\. code-block:: \w+\n\n"
                     r"((?:(?: +.*)?\n)+)", re.M)


def write(page, folder):
    """Write each example of an rst page to a file of its name."""
    folder.mkdir()
    for name, text in EXAMPLE.findall(page.read_text()):
        (folder / name).write_text(textwrap.dedent(text).strip() + "\n")
