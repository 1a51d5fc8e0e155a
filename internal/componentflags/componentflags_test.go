package componentflags

import (
	"slices"
	"testing"
)

func TestMerge(t *testing.T) {
	defaults := map[string]string{"b": "1", "a": "x=y", "c": ""}
	for _, tc := range []struct {
		name string
		user []string
		want []string
	}{
		{"defaults in order", nil, []string{"--a=x=y", "--b=1", "--c="}},
		{"user replaces", []string{"b=2"}, []string{"--a=x=y", "--c=", "--b=2"}},
		{"dashes and no value", []string{"--v=4", "d"}, []string{"--a=x=y", "--b=1", "--c=", "--v=4", "--d"}},
		{"repeated", []string{"b=2", "b=3"}, []string{"--a=x=y", "--c=", "--b=2", "--b=3"}},
	} {
		got, err := Merge(defaults, tc.user, "--x-arg")
		if err != nil || !slices.Equal(got, tc.want) {
			t.Errorf("%s: %q, %v; want %q", tc.name, got, err, tc.want)
		}
	}
	if _, err := Merge(nil, []string{"=v"}, "--x-arg"); err == nil {
		t.Error("an argument without a name was accepted")
	}
	if !Has([]string{"--v=4"}, "v") || Has([]string{"vv=4"}, "v") {
		t.Error("Has is wrong")
	}
}
