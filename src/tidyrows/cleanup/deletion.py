"""One transaction that deletes tracked rows, and what references them.

It neither commits nor retries: what it did is an :class:`Outcome`, which counts once committed.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING, Any

from tidyrows.cleanup.connection import DeadlineError
from tidyrows.cleanup.cycles import delete_by_levels
from tidyrows.cleanup.dependents import Discovery, acts_unseen, keys_in_use
from tidyrows.cleanup.options import Fate
from tidyrows.cleanup.plan import steps_of
from tidyrows.cleanup.reasons import LATE, LeftoverKind, Reason
from tidyrows.cleanup.report import TableRows, add_rows
from tidyrows.cleanup.run import Outcome
from tidyrows.cleanup.schema_view import SILENT_ACTIONS, with_columns
from tidyrows.dialects import CycleForm
from tidyrows.errors import TidyRowsError
from tidyrows.tracking.keyset import in_order

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    import sqlalchemy as sa

    from tidyrows.cleanup.dependents import Found
    from tidyrows.cleanup.plan import Rows, Step
    from tidyrows.cleanup.run import Kept, Scope
    from tidyrows.keys import KeyedTable, TableName
    from tidyrows.schema.graph import Place

logger = logging.getLogger("tidyrows")


class NewIncarnationError(Exception):
    """A table has been emptied or made anew since the rows were inserted: look at them again."""


class IgnoredDeleteError(TidyRowsError):
    """A DELETE removed nothing and raised nothing, and what these rows reference was to go too."""

    rows: Mapping[Place, Sequence[Any]]


class Deletion:
    """One transaction; ``outcome`` becomes what it did, if it is committed."""

    def __init__(self, scope: Scope, connection: sa.Connection, outcome: Outcome) -> None:
        self._scope = scope
        self._view = scope.view
        self._database = scope.database
        self._dialect = scope.database.dialect
        self._connection = connection
        self._incarnations = scope.incarnations
        self._unguarded: list[Place] = []  # tables to be asked after the DELETEs
        self.outcome = outcome
        self._unsure: Kept = {}  # rows that may be somebody else's by now
        # whether untracked rows reference rows of a table, where that was looked for
        self.referenced: dict[Place, bool] = {}

    def run(
        self, rows: Rows, steps: Sequence[Step] | None = None, *, discover: bool, limit: int
    ) -> None:
        """Delete tracked rows; ``steps`` are the same rows in order, if that is known.

        With ``discover`` it looks for everything that references the rows, else only for what
        references those whose DELETE may delete or change others silently, and rows of tables
        where there was something the last time. ``limit`` is the most untracked rows that may go.
        """
        if self._incarnations.unasked:
            self._learn([*self._incarnations.unasked])
        certain = self._certain(rows)
        steps, rows = steps if certain is rows else None, certain
        if discover:
            self._run_with_dependents(rows, limit)
            steps = ()
        steps = self._steps(rows) if steps is None else steps
        for number, step in enumerate(steps):
            if number and self._scope.run.is_late:
                self._leave(steps[number:])
                break
            if self._may_be_silent(step):
                self._run_with_dependents(step.rows, limit)
            else:
                self._run_step(step, {})
        if self._unguarded:
            self._refuse_former(self._unguarded)

    def _run_with_dependents(self, rows: Rows, limit: int) -> None:
        going, dependents = self._with_dependents(rows, limit)
        # Rows of others go, or are detached, only together with all that they reference.
        together = any(self.referenced[place] for place in rows)
        steps = self._steps(going)
        for number, step in enumerate(steps):
            if number and self._scope.run.is_late:
                self._leave(steps[number:], together=together)
                return
            self._run_step(step, dependents)

    def _run_step(self, step: Step, dependents: Mapping[Place, Collection[Any]]) -> None:
        clock = self._scope.run.options.retry.clock
        started = clock()
        counts = self._delete(step)
        if not step.cycle:
            seconds, place = self.outcome.seconds, step.batches[0].table.place
            seconds[place] = seconds.get(place, 0.0) + clock() - started
        self._refuse_wrong_counts(step, counts)
        self._count(step, counts, dependents)

    def _steps(self, rows: Rows) -> Sequence[Step]:
        return steps_of(self._view.graph, {p: each for p, each in rows.items() if each[1]})

    def _leave(self, steps: Sequence[Step], *, together: bool = False) -> None:
        """End the transaction without these rows of ours, if there is the time to commit."""
        if together or self._scope.run.remaining() <= 0:
            raise DeadlineError("the cleanup's deadline struck before its transaction had ended")
        outcome = self.outcome
        for batch in (batch for step in steps for batch in step.batches):
            kept = outcome.kept.setdefault(batch.table.place, {})
            kept.update(dict.fromkeys(batch.keys, LATE))

    def _count(
        self,
        step: Step,
        counts: Mapping[TableName, int],
        dependents: Mapping[Place, Collection[Any]],
    ) -> None:
        outcome = self.outcome
        for batch in step.batches:
            place, count = batch.table.place, counts[batch.table.name]
            others = dependents.get(place)
            outcome.deleted[place] += max(count - len(others), 0) if others else count
            if count == len(batch.keys):
                ours = batch.keys
                if others:
                    ours = [k for k in ours if k not in others] if len(others) < count else ()
                outcome.gone.setdefault(place, []).append(ours)
            if others:
                rows = TableRows(batch.table, list(others))
                outcome.add(Outcome(dependents={batch.table.name: rows}))

    def _certain(self, rows: Rows) -> Rows:
        """The rows without those that may be somebody else's by now."""
        connection, identity, run = self._connection, self._scope.identity, self._scope.run
        certain, former, ambiguous = rows, self._incarnations.former, self._view.ambiguous
        asked_of = rows.items() if identity or run.is_sweep or former or ambiguous else ()
        for place, (table, keys) in asked_of:
            unsure: dict[Any, Reason] = {}
            if former.get(place):
                unsure = {key: former[place][key] for key in keys if key in former[place]}
            if place in ambiguous:
                unsure |= self._of_several(table, keys)
            if run.is_sweep:
                for key, holder in run.entered_by_others(
                    connection, table, keys, entered=True
                ).items():
                    unsure[key] = Reason(LeftoverKind.HELD, item=table.row(key), holder=holder)
            if identity is not None:
                asked = [key for key in keys if key not in unsure] if unsure else keys
                unsure |= identity.uncertain(connection, self._view.graph, table, asked)
            if unsure:
                self._unsure[place] = unsure
        if self._scope.given and not run.is_sweep:
            self._ask_others(rows)
        for place, unsure in self._unsure.items():
            (table, keys), overtaken = rows[place], self.outcome.overtaken.get(place, ())
            self.outcome.kept[place] = {k: unsure[k] for k in unsure if k not in overtaken}
            certain = {**certain, place: (table, [key for key in keys if key not in unsure])}
        return certain

    def _ask_others(self, rows: Rows) -> None:
        """Leave rows to workers that have entered their keys later; in doubt, they are held.

        Rows whose values were compared are locked by now, so nobody can take their places.
        """
        given, run, database = self._scope.given, self._scope.run, self._database.name
        asked: Rows = {}
        for place, (table, keys) in rows.items():
            some = [key for key in keys if key in given[place]] if place in given else ()
            if some:
                asked[place] = table, some
        claims = run.claims_on_entered(self._connection, database, asked) if asked else {}
        for place, claimed in claims.items():
            table, unsure = asked[place][0], self._unsure.setdefault(place, {})
            for key, claim in claimed.items():
                item = table.row(key)
                unsure[key] = Reason(LeftoverKind.HELD, item=item, holder=claim.holder)
                if claim.is_later and place not in self._view.ambiguous:
                    self.outcome.overtaken.setdefault(place, set()).add(key)

    def _of_several(self, table: KeyedTable, keys: Sequence[Any]) -> dict[Any, Reason]:
        """The keys that name no row or several, by the rows, which are locked."""
        rows = self._dialect.find(self._connection, table, keys, table.key_clauses, lock=True)
        found = Counter([row if len(row) > 1 else row[0] for row in rows])
        several = Reason(LeftoverKind.AMBIGUOUS)
        return {key: several for key in keys if found[key] != 1}

    def _with_dependents(
        self, rows: Rows, limit: int
    ) -> tuple[Rows, Mapping[Place, Collection[Any]]]:
        """Find what references these rows; detach what may stay."""
        scope, kept_here, unsure = self._scope, self.outcome.kept, self._unsure
        tracked = {
            place: (set(keys) - unsure[place].keys()) if place in unsure else keys
            for place, keys in scope.tracked.items()
        }
        discovery = Discovery(scope, self._connection, tracked=tracked, limit=limit)
        found = discovery.look({place: keys for place, (_table, keys) in rows.items()})
        labelled = [place for place in rows if place in self._incarnations.present]
        if labelled:  # rows that others reference are locked now, and nothing is touched yet
            self._refuse_former(labelled)
        for place, kept in discovery.kept.items():
            mine = scope.tracked.get(place, ())
            kept_here.setdefault(place, {}).update(
                (key, reason) for key, reason in kept.items() if key in mine
            )
        for place, others in found.dependents.items():
            if place in kept_here:  # those went as dependents
                kept = kept_here[place]
                kept_here[place] = {key: kept[key] for key in kept if key not in others}
        self._detach(discovery, found)
        self.referenced |= dict.fromkeys(rows, False) | dict.fromkeys(found.parents, True)
        going: Rows = {}
        for place, doomed in found.doomed.items():
            known = rows.get(place)
            table = known[0] if known else self._view.table(self._connection, place)
            going[place] = table, in_order(doomed)
        if logger.isEnabledFor(logging.DEBUG):
            self._log(found, discovery)
        return going, found.dependents

    def _detach(self, discovery: Discovery, found: Found) -> None:
        """Detach what may stay, and delete rows that have no key."""
        connection, view, outcome = self._connection, self._view, self.outcome
        for key, rows in found.detached.items():
            doomed = found.doomed.get(key.child, {})
            keys = [each for each in in_order(rows) if each not in doomed]
            if not keys:
                continue
            child = view.table(connection, key.child)
            if discovery.fate(key) is Fate.DETACHED:
                wide = with_columns(child, key.child_columns)
                self._dialect.set_null(connection, wide, keys, discovery.nulled(key))
            add_rows(outcome.detached, TableRows(child, keys))
        for key, (values, count) in found.unnamed.items():
            reference, fate = view.reference(connection, key), discovery.fate(key)
            into = outcome.detached
            if fate is Fate.DETACHED:
                self._dialect.set_null(connection, reference, values, discovery.nulled(key))
            elif fate is Fate.DELETED:
                into = outcome.dependents
                if self._dialect.delete_by_keys(connection, reference, values) < count:
                    raise TidyRowsError(
                        f"rows of {reference.name} that reference it would not go: DELETE removed "
                        f"nothing and raised nothing"
                    )
            add_rows(into, TableRows(reference, (), count))

    def _log(self, found: Found, discovery: Discovery) -> None:
        """DEBUG of each decision: tables, foreign keys and counts, never a key."""
        for place, rows in found.dependents.items():
            logger.debug(
                "%s.%s: %d untracked row(s) go, since they reference rows that go",
                *place,
                len(rows),
            )
        counts = {key: len(rows) for key, rows in found.detached.items() if rows}
        counts |= {key: n for key, (_values, n) in found.unnamed.items()}
        for key, count in counts.items():
            logger.debug(
                "%s.%s: %d untracked row(s) reference rows that go by (%s): %s",
                *key.child,
                count,
                ", ".join(key.child_columns),
                discovery.fate(key).name,
            )

    def _may_be_silent(self, step: Step) -> bool:
        """Whether the DELETE of these rows may delete or change untracked rows silently."""
        connection, view = self._connection, self._view
        places = {batch.table.place for batch in step.batches} if step.cycle else ()
        for batch in step.batches:
            place = batch.table.place
            if place in view.with_dependents:
                return True
            incoming = view.incoming(place)
            if incoming and self._dialect.enforces_foreign_keys(connection):
                incoming = tuple(key for key in incoming if key.on_delete in SILENT_ACTIONS)
            if not incoming:
                continue
            if any(key.child in places or acts_unseen(view, key) for key in incoming):
                return True
            self._dialect.lock(connection, batch.table, batch.keys)
            if keys_in_use(connection, self._dialect, view, place, batch.keys, incoming=incoming):
                return True
        return False

    def _refuse_wrong_counts(self, step: Step, counts: Mapping[TableName, int]) -> None:
        """Roll back where a DELETE took more rows than it was given keys, or fewer than is safe.

        Fewer is not safe where a row did not go and one that it references is to go after it.
        """
        stay: dict[Place, Sequence[Any]] = {}
        for batch in step.batches:
            count = counts[batch.table.name]
            if count > len(batch.keys):
                raise TidyRowsError(
                    f"the DELETE of {len(batch.keys)} key(s) took {count} rows and was rolled "
                    f"back: what the model calls the primary key is not unique in the database, or "
                    f"other tables inherit from this one, so rows of others were among them"
                )
            if count == len(batch.keys):
                continue
            place = batch.table.place
            outgoing = self._view.graph.outgoing(place)
            if any(key.parent in self._scope.tracked for key in outgoing):
                keys = self._database.existing_inside(self._connection, batch.table, batch.keys)
                if keys:
                    stay[place] = keys
        if stay:
            raise IgnoredDeleteError("DELETE removed nothing and raised nothing", rows=stay)

    def _delete(self, step: Step) -> dict[TableName, int]:
        connection, dialect = self._connection, self._dialect
        if not step.cycle:
            (batch,) = step.batches
            table, place = batch.table, batch.table.place
            present = self._incarnations.present.get(place)
            if not present or not dialect.guards_deletes:
                if present is not None:
                    self._unguarded.append(place)
                return {table.name: dialect.delete_by_keys(connection, table, batch.keys)}
            guard = dialect.guard(present, self._incarnations.highest[place])
            count = dialect.delete_by_keys(connection, table, batch.keys, guard)
            if count < len(batch.keys):
                self._refuse_former([place])
            return {table.name: count}
        present_ones = self._incarnations.present
        self._unguarded += [b.table.place for b in step.batches if b.table.place in present_ones]
        one_statement = dialect.cycle_form is CycleForm.ONE_STATEMENT
        if one_statement or not any(key.on_delete == "CASCADE" for key in step.cycle):
            return self._delete_cycle(step)
        # CASCADE deletes other rows of the step before their turn, and does not count them.
        before = self._present(step)
        self._delete_cycle(step)
        after = self._present(step)
        return {name: count - after[name] for name, count in before.items()}

    def _refuse_former(self, places: Sequence[Place]) -> None:
        """Roll back where one of these tables is in another incarnation than was known."""
        if self._learn(places):
            raise NewIncarnationError

    def _learn(self, places: Sequence[Place]) -> bool:
        highest = self._incarnations.highest
        asked = {place: highest[place] for place in places if highest[place]}
        now = self._dialect.incarnations(self._connection, places, asked)
        news = [self._incarnations.learn(place, now.get(place, "")) for place in places]
        return any(news)

    def _delete_cycle(self, step: Step) -> dict[TableName, int]:
        if self._dialect.cycle_form is CycleForm.LEVELS:
            allowed = self._scope.run.options.allow_foreign_keys_off
            return delete_by_levels(
                self._connection, self._database, self._view, step, foreign_keys_off=allowed
            )
        rows = [(batch.table, batch.keys) for batch in step.batches]
        counts = self._dialect.delete_cycle(self._connection, rows)
        return {b.table.name: count for b, count in zip(step.batches, counts, strict=True)}

    def _present(self, step: Step) -> dict[TableName, int]:
        return {
            batch.table.name: len(
                self._dialect.existing_keys(self._connection, batch.table, batch.keys)
            )
            for batch in step.batches
        }
