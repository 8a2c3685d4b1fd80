"""What runs when: recipes, the Prefect flow, the loupe command, the report."""
