Feature: Log in

  Scenario: A user logs in
    Given the user Ann
    When Ann logs in
    Then the answer is 303
    And Ann reads her name on the page of her orders

  Scenario Outline: A wrong password is refused
    Given the user Ann
    When Ann logs in with the password "<password>"
    Then the answer is 401
    And there is no cookie

    Examples:
      | password                     |
      |                              |
      | wrong                        |
      | CORRECT HORSE BATTERY STAPLE |

  Scenario: A stranger is refused
    When somebody logs in whom the shop does not know
    Then the answer is 401

  Scenario Outline: A guest must log in first
    When a guest asks for <what>
    Then the answer is 401

    Examples:
      | what        |
      | basket      |
      | orders      |
      | place_order |
      | log_out     |
