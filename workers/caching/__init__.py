"""The feature cache: planned in units, encoded beside the preparing of the next, committed by table, read like the live encoder."""
