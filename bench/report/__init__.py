"""``trisparse bench report``: rows of benchmarks as one HTML page, and its charts as PNGs."""
