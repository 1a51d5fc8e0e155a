package componentflags

import (
	"errors"
	"fmt"
	"strings"
)

// Decided are flags of a component that users cannot give, because kedge has decided
// them or because they would do nothing, each with what to do instead. A name that ends
// in a star stands for all that begin like it.
type Decided map[string]string

// Logging are those about the form of the log, which all components have: the process
// has one log.
var Logging = Decided{
	"logging-format":      "the log has one form for all parts; use --log-format",
	"log-json-*":          "the log has one form for all parts; use --log-format",
	"log-text-*":          "the log has one form for all parts; use --log-format",
	"log-flush-frequency": "the log is written at once; leave it out",
}

// Clients are those about how a component calls the API server, which all that do have.
var Clients = Decided{
	"kubeconfig": "kedge connects its components itself; leave it out",
	"master":     "kedge connects its components itself; leave it out",
	"kube-api-*": "kedge's own components call the API without limits of their own; leave it out",
}

// Check says which of user's flags are among d, each in one sentence. from is as in
// [Merge].
func Check(user []string, from string, d ...Decided) error {
	var errs []error
	for _, arg := range user {
		name, _, _ := Split(arg)
		for _, some := range d {
			if instead, ok := some.find(name); ok {
				errs = append(errs, fmt.Errorf("%s: %s cannot be set: %s", from, name, instead))
			}
		}
	}
	return errors.Join(errs...)
}

func (d Decided) find(name string) (instead string, ok bool) {
	name = strings.ReplaceAll(name, "_", "-") // the kubelet takes both
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
