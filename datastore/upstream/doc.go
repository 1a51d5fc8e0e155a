// Package upstream runs Kubernetes' own tests of its storage on kedge's datastore. It has only a test. These tests are the
// contract of the clients of package datastore. No package imports it.
package upstream
