"""From a checkpoint to folders that any server takes."""
