"""The Kubernetes platform: builds are Jobs, deployments are Deployments behind an Ingress or a Gateway."""
