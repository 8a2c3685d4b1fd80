"""What is computed: views, encoder, connector, language model, losses. Needs neither a cluster nor a store."""
