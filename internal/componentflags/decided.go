package componentflags

import (
	"errors"
	"strings"

	"kedge/internal/errorkind"
)

// Decided has the flags of a component that users cannot set, because kedge sets them or
// because they would have no effect, each with its alternative. A name that ends in a star is a
// prefix.
type Decided map[string]string

// Logging has the flags of the log's format, which all components have: the process has only
// one log.
var Logging = Decided{
	"logging-format":      "the log has one form for all parts; use --log-format",
	"log-json-*":          "the log has one form for all parts; use --log-format",
	"log-text-*":          "the log has one form for all parts; use --log-format",
	"log-flush-frequency": "the log is written at once; leave it out",
}

// Clients has the flags of a component's client of the API server.
var Clients = Decided{
	"kubeconfig": "kedge connects its components itself; leave it out",
	"master":     "kedge connects its components itself; leave it out",
	"kube-api-*": "kedge's own components call the API without limits of their own; leave it out",
}

// Check returns an error for each of user's flags that is among d. from is as in [Merge].
func Check(user []string, from string, d ...Decided) error {
	var errs []error
	for _, arg := range user {
		name, _, _ := Split(arg)
		for _, some := range d {
			if instead, ok := some.find(name); ok {
				errs = append(errs, errorkind.BadSetting(from, ": %s cannot be set: %s", name, instead))
			}
		}
	}
	return errors.Join(errs...)
}

func (d Decided) find(name string) (instead string, ok bool) {
	name = strings.ReplaceAll(name, "_", "-") // the kubelet accepts both
	if instead, ok := d[name]; ok {
		return instead, true
	}
	for pattern, instead := range d {
		if begin, ok := strings.CutSuffix(pattern, "*"); ok && strings.HasPrefix(name, begin) {
			return instead, true
		}
	}
	return "", false
}
