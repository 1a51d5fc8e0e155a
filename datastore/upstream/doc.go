// Package upstream has no code, only a test: Kubernetes' own tests of its storage, run on kedge's datastore.
// They are the contract of the clients that package datastore hands out. Nobody imports it.
package upstream
