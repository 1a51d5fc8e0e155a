// Package custom reads what a cluster's administrator adds to its names: the
// ConfigMap kedge-dns in kube-system.
//
//	stub-zones   corp.example 10.0.0.53 10.0.0.54:5353     who is asked for a zone
//	hosts        192.0.2.7 printer.lan printer             as in /etc/hosts
//	rewrites     old.example new.example                   another name for a name
//	             *.old.example *.new.example               and for all below one
//
// One entry a line; empty lines and what follows # do not count. A mistake spoils the
// whole ConfigMap, so that half of a change is never in force.
//
// It only reads; package dns applies. Only packages under dns may import it.
package custom
