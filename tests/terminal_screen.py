"""What a terminal shows after it was written to: as much of a VT100 as a line of status needs."""

import re

_ESCAPE = re.compile(r"\033(?:\[([0-9;]*)([A-Za-z])|([78]))")


class TerminalScreen:
    """Rows of text, the cursor, and the margins between which they scroll."""

    def __init__(self, rows: int, columns: int) -> None:
        self.rows = [""] * rows
        self.columns = columns
        self.row = self.column = 0
        self._top, self._bottom = 0, rows - 1
        self._saved = (0, 0)

    def write(self, text: str) -> None:
        """As a terminal does; an escape that it does not know is an error."""
        position = 0
        while position < len(text):
            found = _ESCAPE.match(text, position)
            if found:
                self._escape(*found.groups())
                position = found.end()
            else:
                self._put(text[position])
                position += 1

    def _put(self, character: str) -> None:
        if character == "\n":
            if self.row == self._bottom:
                self.rows[self._top : self._bottom + 1] = [*self.rows[self._top + 1 : self._bottom + 1], ""]
            else:
                self.row = min(self.row + 1, len(self.rows) - 1)
        elif character == "\r":
            self.column = 0
        elif character.isprintable():
            line = self.rows[self.row].ljust(self.column)
            self.rows[self.row] = line[: self.column] + character + line[self.column + 1 :]
            self.column += 1
            if self.column > self.columns:
                raise AssertionError(f"row {self.row} is wider than the terminal")
        else:
            raise AssertionError(f"what is {character!r}?")

    def _escape(self, numbers: str | None, command: str | None, digit: str | None) -> None:
        given = [int(number) for number in (numbers or "").split(";") if number]
        if digit == "7":
            self._saved = (self.row, self.column)
        elif digit == "8":
            self.row, self.column = self._saved
        elif command == "r":
            self._top, self._bottom = (given[0] - 1, given[1] - 1) if given else (0, len(self.rows) - 1)
            self.row = self.column = 0
        elif command == "A":
            self.row = max(self.row - given[0], 0)
        elif command == "H":
            self.row, self.column = given[0] - 1, given[1] - 1
        elif command in ("K", "J"):
            self.rows[self.row] = self.rows[self.row][: self.column]
            if command == "J":
                self.rows[self.row + 1 :] = [""] * (len(self.rows) - self.row - 1)
        elif command != "m":
            raise AssertionError(f"what is ESC {numbers}{command}?")
