"""Draws which room imports which: `python tests/rooms.py` writes docs/images/rooms.svg from the source files.

Each room stands above all rooms that it imports. An arrow that follows from others is left out: if A imports B and B
imports C, A -> C is not drawn. Plug-ins are loaded by name, which is no import (`architecture.LOADED`).
"""

from collections import defaultdict

from architecture import PLUGINS, ROOT, imports, modules

PICTURE = ROOT / "docs" / "images" / "rooms.svg"
WIDTH, HEIGHT, STEP_X, STEP_Y = 112, 30, 126, 66
STYLE = (
    ".b{fill:#fff;stroke:#333}.c{fill:#e8f0fb;stroke:#2166ac}.p{fill:#f4f4f4;stroke:#777}"
    ".a{stroke:#555;fill:none;marker-end:url(#m)}"
)
MARKER = (
    '<defs><marker id="m" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
    '<path d="M0 0 8 4 0 8z" fill="#555"/></marker></defs>'
)


def room_of(module: str) -> str:
    """The room of a module: `heads` of h2t.pipeline.heads.stack, `cache/read` of h2t.cache.read.files."""
    _, package, *inside = module.split(".")
    if package == "pipeline":
        return inside[0] if inside else "pipeline"
    return f"cache/{inside[0]}" if len(inside) > 1 else "cache/reader" if inside == ["reader"] else "cache"


def graph() -> dict[str, set[str]]:
    """Room -> the other rooms that one of its modules imports."""
    known = modules()
    rooms: dict[str, set[str]] = {room_of(m): set() for m in known if not m.endswith("__main__")}
    for module in known:
        if room_of(module) in rooms:
            rooms[room_of(module)] |= {room_of(m) for m in imports(known[module]) if m in known} - {room_of(module)}
    rooms.pop("pipeline", None)  # the package's docstring
    return rooms


def below(rooms: dict[str, set[str]], room: str) -> set[str]:
    """The rooms that `room` imports, directly or indirectly."""
    reached: set[str] = set()
    todo = [room]
    while todo:
        todo += rooms[todo.pop()] - reached
        reached |= {r for r in todo if r != room}
    return reached


def drawn() -> str:
    """The picture as SVG text. Raises ValueError if rooms import each other in a circle."""
    rooms = graph()
    reach = {room: below(rooms, room) for room in rooms}
    for room, reached in reach.items():
        if any(room in reach[other] for other in reached):
            raise ValueError(f"{room}: imports run in a circle")
    level: dict[str, int] = {}
    for room in sorted(rooms, key=lambda r: (len(reach[r]), r)):
        level[room] = max((level[other] + 1 for other in reach[room]), default=0)
    floors = defaultdict(list)
    for room in rooms:
        floors[level[room]].append(room)
    direct = {a: {b for b in rooms[a] if not any(b in reach[other] for other in rooms[a])} for a in rooms}
    width = STEP_X * max(map(len, floors.values())) + 20
    height = STEP_Y * len(floors)
    at: dict[str, tuple[float, float]] = {}
    for floor in sorted(floors, reverse=True):  # from the top, each room below the middle of those that import it

        def middle(room: str) -> tuple[float, str]:
            above = [at[other][0] for other in at if room in direct[other]]
            return (sum(above) / len(above) if above else width / 2, room)

        for i, room in enumerate(sorted(floors[floor], key=middle)):
            at[room] = (width / 2 + STEP_X * (i - (len(floors[floor]) - 1) / 2), height - STEP_Y * (floor + 0.5))
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="system-ui, sans-serif" '
        'font-size="13" role="img" aria-label="The rooms; each arrow points from a room down to one that it imports">',
        f'<style>{STYLE}</style>{MARKER}<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for room in sorted(rooms):
        for other in sorted(direct[room]):
            (x, y), (u, v) = at[room], at[other]
            lines.append(f'<path class="a" d="M{x:g} {y + HEIGHT / 2:g} L{u:g} {v - HEIGHT / 2 - 1:g}"/>')
    for room, (x, y) in sorted(at.items()):
        kind = "c" if room.startswith("cache") else "p" if room in PLUGINS else "b"
        lines.append(
            f'<rect class="{kind}" x="{x - WIDTH / 2:g}" y="{y - HEIGHT / 2:g}" width="{WIDTH}" height="{HEIGHT}" '
            f'rx="6"/>'
            f'<text x="{x:g}" y="{y + 4:g}" text-anchor="middle">{room}</text>'
        )
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(drawn(), encoding="utf-8")
