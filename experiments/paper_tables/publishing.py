"""What the commands of this study do with their files: into an MLflow run, and shown."""

from collections.abc import Sequence
from pathlib import Path

from mlflow.tracking import MlflowClient


def publish(files: Sequence[Path], client: MlflowClient, project: str, name: str) -> None:
    """Logs the files as artifacts of a new run of a project, and prints the first, a page, and where they all are.

    A project that is new in a store keeps its artifacts beside the files.
    """
    experiment = client.get_experiment_by_name(project)
    beside = (files[0].parent / "mlartifacts").resolve().as_uri()
    where = experiment.experiment_id if experiment else client.create_experiment(project, artifact_location=beside)
    run = client.create_run(where, run_name=name)
    for file in files:
        client.log_artifact(run.info.run_id, str(file))
    client.set_terminated(run.info.run_id)
    print(files[0].read_text(encoding="utf-8"))
    print(*files, sep="\n")
