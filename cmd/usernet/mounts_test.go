package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// seen is what the mounts' role sees, by path.
type seen struct {
	Files    map[string]string // "" for what is not there
	Warnings []string
}

// mountsRole mounts over files of os.Args[1], in namespaces of its own, and tells what it sees there then.
func mountsRole() int {
	dir := os.Args[1]
	warnings, err := mountEtc(
		[]etcFile{{filepath.Join(dir, "link"), "new\n"}, {filepath.Join(dir, "missing"), "new\n"}},
		[]etcDir{{filepath.Join(dir, "service"), []etcFile{{"conf", "new\n"}}}, {filepath.Join(dir, "no-service"), nil}},
	)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	s := seen{Files: map[string]string{}}
	for _, w := range warnings {
		s.Warnings = append(s.Warnings, w.Error())
	}
	for _, name := range []string{"link", "sub/file", "missing", "service/conf", "service/socket", "no-service"} {
		text, _ := os.ReadFile(filepath.Join(dir, name))
		s.Files[name] = string(text)
	}
	// A replacement is the container's to change, and nothing else of the scratch space can be seen.
	if err := os.WriteFile(filepath.Join(dir, "link"), []byte("changed\n"), 0); err != nil {
		s.Warnings = append(s.Warnings, err.Error())
	}
	if left, _ := filepath.Glob("/tmp/file[0-9]"); len(left) > 0 {
		s.Warnings = append(s.Warnings, "left: "+strings.Join(left, " "))
	}
	return map[bool]int{true: 0, false: 1}[json.NewEncoder(os.Stdout).Encode(s) == nil]
}

func TestMountEtc(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	old := map[string]string{"sub/file": "old\n", "service/conf": "old\n", "service/socket": "old\n"}
	if err := errors.Join(os.Mkdir(at("sub"), 0o755), os.Mkdir(at("service"), 0o755), os.Symlink("sub/file", at("link"))); err != nil {
		t.Fatal(err)
	}
	for name, text := range old {
		if err := os.WriteFile(at(name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	ids, err := ownIDs()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe", dir)
	cmd.Env = []string{roleVariable + "=mounts"}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNS,
		UidMappings: ids.uids, GidMappings: ids.gids, GidMappingsEnableSetgroups: ids.setgroups,
	}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOSPC) {
			t.Skipf("no user namespaces here: %v", namespaceAdvice(err, sysctl))
		}
		t.Fatalf("%v\n%s", err, &stderr)
	}
	var got seen
	if err := json.Unmarshal(out, &got); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		"link": "new\n", "sub/file": "new\n", "service/conf": "new\n",
		"missing": "", "service/socket": "", "no-service": "",
	}
	for name, text := range want {
		if got.Files[name] != text {
			t.Errorf("%s is %q, want %q", name, got.Files[name], text)
		}
	}
	if len(got.Warnings) != 1 || !strings.Contains(got.Warnings[0], "missing stays as it is") {
		t.Errorf("warnings %q", got.Warnings)
	}
	for name, text := range old {
		if now, err := os.ReadFile(at(name)); err != nil || string(now) != text {
			t.Errorf("outside, %s is %q now, %v", name, now, err)
		}
	}
}
