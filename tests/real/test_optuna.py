"""Optuna, which keeps its studies in a database: its models through factories, and itself at work.

Its foreign keys have no ON DELETE, so the order of the deletes is all there is.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import factory
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from harness.bystanders import Bystanders, snapshot
from harness.databases import Database
from real.packages import borrowed
from tidyrows import (
    CleanupManager,
    ResourceTracker,
    Scoped,
    TrackedFactory,
    UntrackedRowsWarning,
)


@pytest.fixture(scope="module")
def optuna() -> Any:
    module = borrowed("optuna", "optuna")
    module.logging.set_verbosity(module.logging.WARNING)
    return module


@pytest.fixture
def storage(optuna: Any, database: Database) -> Iterator[Any]:
    """Optuna's own engine, on its own tables, with a stranger's study in them."""
    url = database.url.render_as_string(hide_password=False)
    made = optuna.storages.RDBStorage(url)
    work(optuna, made, "a stranger's")
    yield made
    made.remove_session()
    made.engine.dispose()


def work(optuna: Any, storage: Any, name: str, *, trials: int = 4) -> Any:
    """A study as anybody's program would run it."""

    def objective(trial: Any) -> float:
        x = trial.suggest_float("x", -1, 1)
        kind = trial.suggest_categorical("kind", ["a", "b"])
        for step in range(3):
            trial.report(x * step, step)
        trial.set_user_attr("kind", kind)
        if trial.number == 2:
            raise optuna.TrialPruned
        return float(x**2)

    study = optuna.create_study(
        storage=storage, study_name=name, sampler=optuna.samplers.RandomSampler(seed=1)
    )
    study.set_user_attr("made by", name)
    study.enqueue_trial({"x": 0.5})
    study.optimize(objective, n_trials=trials)
    return study


def heard(database: Database) -> AbstractContextManager[Any]:
    """Optuna sets attributes by upserts; only PostgreSQL proves which rows these have made."""
    if database.backend == "postgresql":
        return nullcontext()
    return pytest.warns(UntrackedRowsWarning, match="upsert .*track_query")


def own_upserts(tracker: ResourceTracker) -> None:
    """What the warning says."""
    models = borrowed("optuna.storages._rdb.models", "optuna")
    for model in (models.TrialSystemAttributeModel, models.TrialUserAttributeModel):
        of_ours = sa.select(model).join(models.TrialModel).where(tracker.mine(models.TrialModel))
        tracker.track_query(of_ours)


def counts(tracker: ResourceTracker) -> dict[str, int]:
    return dict(Counter(row.table.name for row in tracker.rows()))


def gained(bystanders: Bystanders, storage: Any) -> dict[str, int]:
    """What there is more than before: the truth, whatever Optuna made of our call."""
    added = snapshot(storage.engine).added_since(bystanders.expected)
    return {table.partition(".")[2]: len(rows) for table, rows in added.items()}


def test_what_an_application_writes_through_its_own_engine(optuna, storage, database):
    bystanders = Bystanders(storage.engine)
    tracker = ResourceTracker(storage.engine)
    with CleanupManager(tracker) as cleanup:
        with heard(database):
            study = work(optuna, storage, "ours")
        assert len(study.trials) == 4
        own_upserts(tracker)
        made = counts(tracker)
        assert made == gained(bystanders, storage)
        assert made["trial_params"] == 2 * len(study.trials)
    deleted = {table.name: count for table, count in cleanup.report.deleted.items()}
    assert deleted == made
    bystanders.assert_untouched()


def test_what_the_application_deletes_itself_is_forgotten(optuna, storage, database):
    bystanders = Bystanders(storage.engine)
    tracker = ResourceTracker(storage.engine)
    with CleanupManager(tracker) as cleanup:
        with heard(database):
            work(optuna, storage, "ours")
        optuna.delete_study(study_name="ours", storage=storage)
        assert counts(tracker) == {}
    assert cleanup.report.total_deleted == 0
    bystanders.assert_untouched()


def test_threads_of_the_application_are_heard(optuna, storage, database):
    """Optuna's own threads know no tracker; there is one only, so their rows are ours."""
    jobs = 1 if database.backend == "sqlite" else 2  # there two writers wait for each other
    bystanders = Bystanders(storage.engine)
    tracker = ResourceTracker(storage.engine)
    with CleanupManager(tracker):
        study = optuna.create_study(
            storage=storage, study_name="ours", sampler=optuna.samplers.RandomSampler(seed=1)
        )
        study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=6, n_jobs=jobs)
        assert counts(tracker)["trials"] == 6
    bystanders.assert_untouched()


@pytest.fixture
def factories(optuna: Any) -> SimpleNamespace:
    """Factories of ours for models that are not."""
    models = borrowed("optuna.storages._rdb.models", "optuna")

    class DirectionFactory(TrackedFactory):
        class Meta:
            model = models.StudyDirectionModel

        direction = optuna.study.StudyDirection.MINIMIZE
        objective = 0

    class StudyFactory(TrackedFactory):
        class Meta:
            model = models.StudyModel

        study_name = Scoped("study-{tag}")
        direction = factory.RelatedFactory(DirectionFactory, factory_related_name="study")

    class ParamFactory(TrackedFactory):
        class Meta:
            model = models.TrialParamModel

        param_name = factory.Sequence("p{}".format)
        param_value = factory.Faker("pyfloat", min_value=0, max_value=1)
        distribution_json = json.dumps(
            {
                "name": "FloatDistribution",
                "attributes": {"step": None, "low": 0.0, "high": 1.0, "log": False},
            }
        )

    class TrialFactory(TrackedFactory):
        class Meta:
            model = models.TrialModel

        number = factory.Sequence(int)
        state = optuna.trial.TrialState.RUNNING
        study = factory.SubFactory(StudyFactory)
        params = factory.RelatedFactoryList(ParamFactory, factory_related_name="trial", size=2)

        @factory.post_generation
        def attributes(self, create, extracted, **kwargs):
            """By relationship and cascade, as the models have it."""
            for key in extracted or ():
                self.user_attributes.append(models.TrialUserAttributeModel(key=key, value_json="1"))

    return SimpleNamespace(study=StudyFactory, trial=TrialFactory)


def test_factories_for_models_that_nobody_here_wrote(optuna, storage, factories, database):
    """The application sees what they commit, and adds rows of its own, which are ours as well."""
    bystanders = Bystanders(storage.engine)
    tracker = ResourceTracker(storage.engine)
    with CleanupManager(tracker):
        one = factories.study()
        factories.trial.create_batch(3, study=one, attributes=["a", "b"])
        alone = factories.trial(attributes=["c"])
        with heard(database):
            work(optuna, storage, "at work beside them", trials=2)
        own_upserts(tracker)
        seen = optuna.load_study(study_name=one.study_name, storage=storage)
        assert [sorted(trial.user_attrs) for trial in seen.trials] == [["a", "b"]] * 3
        assert (
            len(optuna.load_study(study_name=alone.study.study_name, storage=storage).trials) == 1
        )
        made = counts(tracker)
        assert made == gained(bystanders, storage)
        assert made["studies"] == 3
        assert made["trials"] == 3 + 1 + 2
    bystanders.assert_untouched()


def test_trials_are_rolled_back_with_their_savepoint(storage, factories):
    bystanders = Bystanders(storage.engine)
    with Session(storage.engine) as session:
        tracker = ResourceTracker(session)
        with CleanupManager(tracker) as cleanup:
            study = factories.study()
            with session.begin_nested() as savepoint:
                factories.trial.create_batch(2, study=study, attributes=["a"])
                savepoint.rollback()
            session.commit()
            assert counts(tracker) == {"studies": 1, "study_directions": 1}
    assert cleanup.report.total_deleted == 2
    bystanders.assert_untouched()
