"""Looking at methods, weights and adapters: fair comparison, forgetting, what a budget buys."""
