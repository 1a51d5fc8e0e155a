package lifecycle

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
	"time"
)

// TestStartUpTable: the same of each component, for people and for programs.
func TestStartUpTable(t *testing.T) {
	statuses := []Status{
		{Name: "datastore", State: Ready, Took: Duration(1204 * time.Millisecond)},
		{Name: "api", State: Ready, WaitedFor: "datastore", Waited: Duration(1205 * time.Millisecond), Took: Duration(2 * time.Second)},
	}
	var table bytes.Buffer
	if err := WriteTable(&table, statuses); err != nil {
		t.Fatal(err)
	}
	want := "COMPONENT  STATE  WAITED FOR  STARTED AT  READY AFTER\n" +
		"datastore  ready  -           0s          1.204s\n" +
		"api        ready  datastore   1.205s      2s\n"
	if table.String() != want {
		t.Errorf("the table is\n%swant\n%s", table.String(), want)
	}

	var log bytes.Buffer
	LogTable(slog.New(slog.NewJSONHandler(&log, nil)), statuses)
	var got []string
	for line := range strings.Lines(log.String()) {
		_, rest, _ := strings.Cut(line, ",") // the time
		got = append(got, rest)
	}
	if want := `"level":"INFO","msg":"started","component":"datastore","state":"ready","waited_for":"","started_at":"0s","ready_after":"1.204s"}
"level":"INFO","msg":"started","component":"api","state":"ready","waited_for":"datastore","started_at":"1.205s","ready_after":"2s"}
`; strings.Join(got, "") != want {
		t.Errorf("the records are\n%swant\n%s", strings.Join(got, ""), want)
	}
}
