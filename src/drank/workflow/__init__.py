"""What drank knows of files: parameters, sources, atomic writes, MLflow. No numerics here."""
