// Package stats counts the resolver's work and exports it under the names that dashboards
// for CoreDNS use.
//
// Counting a query takes a few atomic additions. Labels with a single value here ("server",
// "view") exist because dashboards query them.
//
// Only packages below dns may import it.
package stats
