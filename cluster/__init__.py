"""Where it runs: Ray cluster files, Kubernetes manifests, preflight, submission, dashboard."""
