module ekiben.test/cni-policies

go 1.26.0
