"""Steps of the pipeline, without paths: from mappings to mappings. Import method and model, never another step."""
