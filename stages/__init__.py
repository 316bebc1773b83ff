"""The pipeline: one thin script a step, run by DVC as ``python -m stages.<step>``. Read, call the library, write."""

from drank.project.command import quieten_libraries

quieten_libraries()
