"""The files of startup/ go to the top of site-packages, the root of all packages, where Python looks when it starts."""

from setuptools import setup

setup(packages=[""], package_dir={"": "startup"}, package_data={"": ["*.pth", "*.start"]}, include_package_data=False)
