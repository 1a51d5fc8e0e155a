package server

// Upstream's programs import these packages in their mains for their side effects:
// the metrics kubernetes_build_info, rest_client_* and workqueue_*, and the time zones of
// CronJobs on machines that have no zone files. A test of scripts/house compares the list
// with upstream's.
import (
	_ "time/tzdata"

	_ "k8s.io/component-base/metrics/prometheus/clientgo"
	_ "k8s.io/component-base/metrics/prometheus/version"
)
