"""The only code that imports Ray: start-up and preflight, and the jobs on top of the pure rooms."""
