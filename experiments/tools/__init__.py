"""Published figures beside ours, what an experiment will take, and copies of dvc.yaml for other folders."""

from drank.project.command import quieten_libraries

quieten_libraries()
