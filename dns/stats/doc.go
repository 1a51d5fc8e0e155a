// Package stats counts what the resolver does and shows it under the names that
// dashboards for CoreDNS use.
//
// Counting is a few atomic additions: every query does it. Labels that have one
// value here ("server", "view") are there because dashboards ask for them.
//
// Only packages under dns may import it.
package stats
