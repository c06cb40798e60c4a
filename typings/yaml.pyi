from typing import Any, TextIO

__version__: str

class Mark:
    line: int
    column: int

class YAMLError(Exception): ...

class MarkedYAMLError(YAMLError):
    context: str | None
    context_mark: Mark | None
    problem: str | None
    problem_mark: Mark | None

class Node:
    tag: str
    value: Any
    start_mark: Mark
    end_mark: Mark

class ScalarNode(Node):
    value: str
    style: str | None

class SequenceNode(Node):
    value: list[Node]

class MappingNode(Node):
    value: list[tuple[Node, Node]]

class BaseLoader:
    def __init__(self, stream: str | bytes | TextIO) -> None: ...
    def get_single_node(self) -> Node | None: ...
    def compose_node(self, parent: Node | None, index: Any) -> Node | None: ...
    def dispose(self) -> None: ...

def compose(stream: str | bytes | TextIO, Loader: type[BaseLoader] = ...) -> Node | None: ...
def safe_load(stream: str | bytes | TextIO) -> Any: ...
