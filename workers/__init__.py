"""What runs on the cluster: dataset building, feature caching, training, evaluation, export, storage and tables."""
