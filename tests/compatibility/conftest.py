"""The cells are imported by the test that runs them, once; as files of doctests they would be registered again."""

collect_ignore_glob = ["cells*.py", "by_hand.py"]
