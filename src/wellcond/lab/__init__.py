"""The experiment harness: trains a network with and without the techniques and shows what each gained and cost."""
