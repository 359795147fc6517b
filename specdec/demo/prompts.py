"""Prompts of the demo: the beginnings of six Python files, written for it.

They are in a manner that goes on, methods after methods and cases after cases, because that is
what the toy model can continue, and where text repeats is where drafting from text pays.
"""

from __future__ import annotations

from collections.abc import Mapping

_TEST_CASE = """\
import unittest


class StackTest(unittest.TestCase):

    def setUp(self):
        self.stack = Stack()

    def test_push(self):
        self.stack.push(1)
        self.assertEqual(self.stack.size(), 1)
        self.assertEqual(self.stack.top(), 1)

    def test_push_twice(self):
        self.stack.push(1)
        self.stack.push(2)
        self.assertEqual(self.stack.size(), 2)
        self.assertEqual(self.stack.top(), 2)

    def test_pop(self):
"""

_ARGUMENTS = """\
import argparse


def parse_args(args=None):
    parser = argparse.ArgumentParser(description="Copy files from one place to another.")
    parser.add_argument("source", help="the file to read")
    parser.add_argument("target", help="the file to write")
    parser.add_argument("-v", "--verbose", action="store_true",
                        help="print the name of each file")
    parser.add_argument("-f", "--force", action="store_true",
                        help="replace the file if it exists")
    parser.add_argument("-n", "--name",
"""

_PROPERTIES = '''\
class Rectangle:
    """A rectangle with a position and a size."""

    def __init__(self, left, top, width, height):
        self._left = left
        self._top = top
        self._width = width
        self._height = height

    @property
    def left(self):
        """The left edge."""
        return self._left

    @property
    def top(self):
        """The top edge."""
        return self._top

    @property
'''

_DISPATCH = '''\
def write_value(self, value):
    """Write a value and return the number of bytes written."""
    if value is None:
        return self.write_none()
    elif isinstance(value, bool):
        return self.write_bool(value)
    elif isinstance(value, int):
        return self.write_int(value)
    elif isinstance(value, float):
        return self.write_float(value)
    elif isinstance(value, str):
'''

_WRAPPER = '''\
class FileWrapper:
    """Pass every call on to another file."""

    def __init__(self, file):
        self.file = file
        self.closed = False

    def read(self, size=-1):
        if self.closed:
            raise ValueError("I/O operation on closed file")
        return self.file.read(size)

    def readline(self, size=-1):
        if self.closed:
            raise ValueError("I/O operation on closed file")
        return self.file.readline(size)

    def write(self, data):
'''

_NUMBERS = """\
class Vector:
    def __init__(self, x, y):
        self.x = x
        self.y = y

    def __add__(self, other):
        if not isinstance(other, Vector):
            return NotImplemented
        return Vector(self.x + other.x, self.y + other.y)

    def __sub__(self, other):
        if not isinstance(other, Vector):
            return NotImplemented
        return Vector(self.x - other.x, self.y - other.y)

    def __mul__(self, other):
"""

PROMPTS: Mapping[str, str] = {
    "properties": _PROPERTIES,
    "test case": _TEST_CASE,
    "arguments": _ARGUMENTS,
    "dispatch": _DISPATCH,
    "file wrapper": _WRAPPER,
    "operators": _NUMBERS,
}
"""Title -> text."""
