"""Imports go one way inside packages too: no module imports itself through others, type checking included."""

import grimp

PACKAGES = ("models", "compress", "app", "recipes")


def circles(graph: grimp.ImportGraph) -> list[list[str]]:
    """Groups of modules that import each other (strongly connected components, Kosaraju)."""
    order, seen = [], set()
    for start in graph.modules:
        stack = [(start, False)]
        while stack:
            module, done = stack.pop()
            if done:
                order.append(module)
            elif module not in seen:
                seen.add(module)
                stack += [
                    (module, True),
                    *((next_, False) for next_ in graph.find_modules_directly_imported_by(module)),
                ]
    found, placed = [], set()
    for start in reversed(order):
        group, stack = [], [start]
        while stack:
            module = stack.pop()
            if module not in placed:
                placed.add(module)
                group.append(module)
                stack += graph.find_modules_that_directly_import(module)
        found.append(sorted(group))
    return [group for group in found if len(group) > 1]


def test_no_module_imports_itself_through_others():
    assert circles(grimp.build_graph(*PACKAGES, exclude_type_checking_imports=False)) == []


def test_a_circle_is_found():
    graph = grimp.ImportGraph()
    for importer, imported in (("a", "b"), ("b", "c"), ("c", "a"), ("c", "d")):
        graph.add_import(importer=importer, imported=imported)
    assert circles(graph) == [["a", "b", "c"]]
