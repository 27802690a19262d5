"""Small random problems of additive objectives, and their fronts by brute force."""

import random

from hf_elastic.search import AdditiveTable, Objective
from hf_elastic.search.limits import Limit
from hf_elastic.space import Choice, Condition, SearchSpace

KINDS = ("integers", "eighths", "reals")


def a_choice(name, rng, earlier=()):
    """One choice of one to three values, now and then in effect only for some values of an earlier one."""
    when = ()
    if earlier and rng.random() < 0.6:
        other = rng.choice(earlier)
        when = (Condition(other.name, tuple(rng.sample(other.values, rng.randint(1, len(other.values))))),)
    count = rng.randint(1, 3)
    if rng.random() < 0.3:
        sizes = tuple(rng.randint(0, 9) for _ in range(count))
        return Choice(name, tuple("abc"[:count]), "categorical", sizes, when)
    return Choice(name, tuple(range(1, count + 1)), when=when)


def with_conditions(chosen, declared):
    """Names of choices and of all that their conditions name."""
    names = {choice.name for choice in chosen}
    for choice in reversed(declared):
        if choice.name in names:
            names |= {condition.choice for condition in choice.when}
    return names


def a_grouped_space(rng):
    """A space of one to four groups, which share up to two choices or none."""
    shared = [a_choice("depth", rng)] if rng.random() < 0.6 else []
    if shared and rng.random() < 0.5:
        shared.append(a_choice("width", rng, shared))
    declared, groups = list(shared), []
    for number in range(rng.randint(1, 4)):
        own = []
        for letter in "pq"[: rng.randint(1, 2)]:
            own.append(a_choice(f"layers.{number}.{letter}", rng, shared + own))
        used = [choice for choice in shared if number == 0 or rng.random() < 0.7]
        declared += own
        names = sorted(with_conditions(own + used, declared))
        rng.shuffle(names)
        groups.append(tuple(names))
    return SearchSpace(declared), tuple(groups)


def a_number(kind, rng):
    if kind == "integers":
        return rng.randint(-5, 20)
    return rng.randint(-40, 160) / 8 if kind == "eighths" else rng.uniform(-1, 3)


def a_table(space, groups, kind, rng):
    tables = []
    for names in groups:
        points = list(SearchSpace(choice for choice in space if choice.name in names).architectures())
        rng.shuffle(points)
        tables.append({tuple(point[name] for name in names): a_number(kind, rng) for point in points})
    return AdditiveTable(groups, tuple(tables), constant=a_number(kind, rng))


def an_objective(name, table, **options):
    """An objective that does not ask its table."""

    def total(architecture):
        rows = zip(table.groups, table.tables, strict=True)
        return table.constant + sum(entries[tuple(architecture[n] for n in names)] for names, entries in rows)

    return Objective(name, total, additive=table, **options)


def a_problem(seed, count):
    """A generator, a space and some costs in either direction."""
    rng = random.Random(seed)
    space, groups = a_grouped_space(rng)
    costs = [
        an_objective(
            f"cost{number}",
            a_table(space, groups, rng.choice(KINDS), rng),
            direction=rng.choice(("minimize", "maximize")),
            cost=True,
        )
        for number in range(count)
    ]
    return rng, space, costs


def widths_problem(layers, widths, seed=0):
    """Damage and parameters of layers with a width each."""
    rng = random.Random(seed)
    names = [f"layers.{i}.intermediate_size" for i in range(layers)]
    space = SearchSpace(Choice(name, tuple(64 * (w + 1) for w in range(widths))) for name in names)
    groups = tuple((name,) for name in names)
    damage = tuple({(v,): rng.random() / v for v in choice.values} for choice in space)
    size = tuple({(v,): v * price for v in choice.values} for choice in space for price in [rng.randint(50, 99)])
    return space, [
        an_objective("damage", AdditiveTable(groups, damage)),
        an_objective("parameters", AdditiveTable(groups, size, 1000.0), cost=True, unit="parameters"),
    ]


def tied_problem():
    """Two objectives of layers that are all alike and share a choice: many architectures have the same values."""
    names = [f"layers.{i}.a" for i in range(5)]
    space = SearchSpace(Choice(name, (1, 2, 3)) for name in ("depth", *names))
    groups = tuple(("depth", name) for name in names)
    one = {(d, v): (d * v) % 3 for d in (1, 2, 3) for v in (1, 2, 3)}
    two = {(d, v): (d + v) % 4 for d in (1, 2, 3) for v in (1, 2, 3)}
    tables = {"one": one, "two": two}
    return space, [an_objective(n, AdditiveTable(groups, (table,) * len(names))) for n, table in tables.items()]


def a_limit(objective, space, rng):
    """A limit that some architecture just keeps."""
    values = sorted(objective.additive.value(architecture) for architecture in space.architectures())
    return Limit(objective.name, rng.choice(values), objective.direction, cost=True)


def vectors_within(space, objectives, limits):
    """Values of every architecture within limits, by name."""
    rows = [{o.name: o.additive.value(a) for o in objectives} for a in space.architectures()]
    return [row for row in rows if all(limit.allows(row[limit.name]) for limit in limits)]


def brute_forced_front(space, goals, *, limits=(), others=()):
    """Vectors of values, of the goals, that no architecture within the limits betters."""
    rows = vectors_within(space, [*goals, *others], limits)
    vectors = {tuple(goal.sign * row[goal.name] for goal in goals) for row in rows}
    best = {v for v in vectors if not any(w != v and all(x <= y for x, y in zip(w, v, strict=True)) for w in vectors)}
    return {tuple(goal.sign * value for goal, value in zip(goals, vector, strict=True)) for vector in best}
