package network

import (
	"errors"
	"fmt"
)

// What is wrong, for who has to answer in codes: errors.Is tells.
var (
	ErrInvalid   = errors.New("invalid")      // no state of the Set would make it right
	ErrNotFound  = errors.New("not found")    // no such network or member
	ErrConflict  = errors.New("conflict")     // somebody else has it
	ErrExhausted = errors.New("exhausted")    // a pool or a limit
	ErrOtherBoot = errors.New("another boot") // a record of before the last reboot
)

// An explained error has words for the user alone, and a reason for errors.Is.
type explained struct {
	reason error
	text   string
}

func (e *explained) Error() string { return e.text }
func (e *explained) Unwrap() error { return e.reason }

func invalidf(format string, args ...any) error   { return explain(ErrInvalid, format, args...) }
func conflictf(format string, args ...any) error  { return explain(ErrConflict, format, args...) }
func exhaustedf(format string, args ...any) error { return explain(ErrExhausted, format, args...) }

func explain(reason error, format string, args ...any) error {
	return &explained{reason, fmt.Sprintf(format, args...)}
}
