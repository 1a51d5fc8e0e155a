// Package custom parses the administrator's additions to the names of a cluster: the
// ConfigMap kedge-dns in kube-system.
//
//	stub-zones   corp.example 10.0.0.53 10.0.0.54:5353     name servers of a zone
//	hosts        192.0.2.7 printer.lan printer             as in /etc/hosts
//	rewrites     old.example new.example                   an alias for a name
//	             *.old.example *.new.example               and for all names below one
//
// One entry for each line; empty lines and text after # are ignored. An error invalidates
// the whole ConfigMap, so that a change is never applied in part.
//
// The package only parses; package dns applies. Only packages below dns may import it.
package custom
