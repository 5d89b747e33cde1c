"""The recipes of the commands, one file each, and the stages that they are made of, one folder each."""
