package unexported

import (
	"reflect"
	"testing"
)

type inner struct{ text string }

type outer struct{ in any }

func TestField(t *testing.T) {
	o := &outer{in: &inner{text: "before"}}
	in, err := Field[any](reflect.ValueOf(o), "in")
	if err != nil {
		t.Fatal(err)
	}
	text, err := Field[string](reflect.ValueOf(*in), "text")
	if err != nil {
		t.Fatal(err)
	}
	*text = "after"
	if got := o.in.(*inner).text; got != "after" {
		t.Errorf("the field is %q", got)
	}
}

func TestFieldIsRefused(t *testing.T) {
	o := &outer{in: inner{}}
	if _, err := Field[any](reflect.ValueOf(o), "out"); err == nil {
		t.Error("a field that is not there")
	}
	if _, err := Field[string](reflect.ValueOf(o), "in"); err == nil {
		t.Error("a field of another type")
	}
	if _, err := Field[any](reflect.ValueOf(*o), "in"); err == nil {
		t.Error("a struct without an address")
	}
	if _, err := Field[string](reflect.ValueOf(o.in), "text"); err == nil {
		t.Error("a struct in an interface, which has no address either")
	}
	if _, err := Field[string](reflect.ValueOf(7), "text"); err == nil {
		t.Error("no struct")
	}
}
