def plot_graph(*a, **k): raise NotImplementedError
