package commandline

import (
	"os"
	"os/exec"
	"testing"

	"kedge/scripts/e2e/harness"
)

// The reference is made from the program; a page that differs is out of date.
func TestReferenceIsUpToDate(t *testing.T) {
	t.Parallel()
	for _, page := range []string{"commands", "configuration"} {
		want, err := exec.Command(harness.Binary(), "reference", page).Output()
		if err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(harness.InProject("docs/reference/" + page + ".md"))
		if err != nil {
			t.Fatal(err)
		}
		if string(got) != string(want) {
			t.Errorf("docs/reference/%s.md differs from what the program says; run make reference", page)
		}
	}
}
